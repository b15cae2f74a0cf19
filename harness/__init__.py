import os

# Before torch asks for memory: a KV cache that grows would leave a GPU's in pieces.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
