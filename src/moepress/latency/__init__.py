"""How fast models are, side by side, and how close that comes to what the hardware allows.

measuring.py: times in turn. traffic.py: what a forward must read and compute. device.py: what the device can do. graphs.py:
decoding behind a cache of fixed size, as a CUDA graph. shapes.py, building.py: layers of a real model's shape with random
weights."""
