"""Text to image with Stable Diffusion: fast, fair and safe, without an ML framework.

>>> import respodiff
>>> engine = respodiff.Engine("demo", device="cpu")
>>> pictures = engine.generate(["a photo of a doctor"] * 4, balance=["woman", "man"], steps=20, seed=1)
>>> [picture.concepts for picture in pictures]
[['a woman'], ['a man'], ['a man'], ['a woman']]
"""

from ._engine import Engine
from ._errors import Error, InvalidError, IoError, NetworkError, NotFoundError, OutOfMemoryError
from ._respodiff import Concept, Picture, __version__

__all__ = [
    "Concept",
    "Engine",
    "Error",
    "InvalidError",
    "IoError",
    "NetworkError",
    "NotFoundError",
    "OutOfMemoryError",
    "Picture",
    "__version__",
]
