"""Diffusion pipelines: torch, no HTTP, no request ids, no SQL."""
