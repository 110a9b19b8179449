"""Sources of pairs: folders, archives, the Hub, drawings from installed packages."""
