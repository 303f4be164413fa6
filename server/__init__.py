"""HTTP, queue and processes: speaks fal's words and never touches a pixel."""
