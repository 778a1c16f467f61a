"""What a layer with an adapter costs on a GPU that need not be here: bytes, FLOPs and predicted times.

`model.predict` gives every provider's time for layers, groups that share an input, a block and a model; `goals` holds
the lines that measurements are judged by.
"""
