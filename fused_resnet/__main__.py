"""``python -m fused_resnet``: the command line."""

from fused_resnet.cli import app

if __name__ == "__main__":
    app(prog_name="fused-resnet")
