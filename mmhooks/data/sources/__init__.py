"""Where pairs come from: folders, archives, hubs, drawings of installed packages."""
