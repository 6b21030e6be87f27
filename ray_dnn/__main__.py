"""``python -m ray_dnn``."""

from ray_dnn.cli import app

if __name__ == "__main__":
    app()
