"""Which library decodes the crops of training on this machine."""

from data.images.jpeg_region import find_region_decoder
from pipeline.preflight.finding import Findings


def assess_jpeg_decoder() -> Findings:
    """Name it, or say why the libturbojpeg that the environment names cannot be used."""
    found = Findings("")
    with found.capture():
        found.ok(f"JPEGs of training: decoded by {find_region_decoder()}")
    return found
