"""Models from configuration, their state, their costs, their presets, and loading them from checkpoints."""
