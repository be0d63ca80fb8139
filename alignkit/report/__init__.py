"""What a run shows of itself: its page, its model card, its upload, and how it differs from another run."""
