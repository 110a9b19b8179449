"""What every floor may use: files, digests, escaping, progress, processes. Imports nothing of mmhooks but errors."""
