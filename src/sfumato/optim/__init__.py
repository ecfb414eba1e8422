"""How weights move: optimizers, learning rate schedules."""
