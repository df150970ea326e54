"""From runs/published to what is read: claims and their check, figures, the paper, ARTIFACT.md, the README's table."""
