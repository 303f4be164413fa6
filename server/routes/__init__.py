"""HTTP routes, one file per part of fal's API; their paths are those that `server.hosts` makes of all others."""
