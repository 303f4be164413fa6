"""Programs in JavaScript that use fal's client, and what holds them."""
