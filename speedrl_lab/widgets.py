"""The widgets of a training notebook: thin shells around `plots`; without a front end they print and draw."""

from speedrl_lab.board import Board, Stopped

__all__ = ["Board", "Stopped"]
