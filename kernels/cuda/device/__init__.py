"""What runs on the GPU. Imported by compile.py alone, and only when a kernel is not in the cache."""
