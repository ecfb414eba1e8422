"""How a layer's weight changes: one class per kind of adapter; none of them knows a model family."""
