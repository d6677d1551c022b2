"""Clips with references: manifests, decoding, sampling, loading, converters, checks and the cache of latents.

What cannot be read or used is a ValueError that names the file, and where there is one the row and the field.
"""
