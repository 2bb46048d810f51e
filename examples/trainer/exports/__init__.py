"""A trained model for others: without medpeft, as plain weights, an ONNX file or a bundle of MONAI."""

from .kinds import KINDS, check_exports, export

__all__ = ["KINDS", "check_exports", "export"]
