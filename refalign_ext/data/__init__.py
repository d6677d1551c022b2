"""Clips with references: manifests, decoding, sampling, loading, converters, checks and the cache of latents."""
