import os

# Before torch asks for memory: a KV cache that grows may leave a GPU's in pieces.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
