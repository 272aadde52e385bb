"""A layer with fewer or smaller heads, made of a layer's weights: groups, pooling, starts."""
