"""Small programs that use or extend `dreamer.py`. The README of this folder lists them."""
