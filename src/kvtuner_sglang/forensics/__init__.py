"""How the seed report came by its figures: its tests as its script ran them, beside the same tests done right."""
