import os
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union, final

__version__: str

@final
class Engine:
    """An engine that takes requests as JSON. Programs use `respodiff.Engine`."""

    def __new__(cls, model: str, options: str) -> Engine: ...
    def info(self) -> str: ...
    def generate(
        self, request: str, named: Mapping[str, Concept], progress: Optional[Callable[[int, int], object]]
    ) -> Tuple[List[Picture], List[str]]: ...

@final
class Concept:
    """A learnt concept, such as "a woman"."""

    @staticmethod
    def load(path: Union[str, os.PathLike[str]]) -> Concept:
        """Reads a concept file, or the demo's concept of that name if there is no such file."""
    @property
    def name(self) -> str:
        """The prompt that it was trained for, such as "a woman"."""
    @property
    def path(self) -> str:
        """The file, as it was named."""
    @property
    def fingerprint(self) -> str:
        """An identifier of its numbers."""
    def __reduce__(self) -> Tuple[Any, ...]: ...

@final
class Picture:
    """An 8-bit RGB picture, which also is a numpy array by `numpy.asarray(picture)`, without a copy."""

    def __new__(cls, width: int, height: int, rgb: bytes, parameters: str) -> Picture: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def concepts(self) -> List[str]:
        """The names of its concepts, such as "a woman"."""
    @property
    def info(self) -> Dict[str, Any]:
        """How it was made, as its file records it."""
    @property
    def rgb(self) -> bytes:
        """A copy of the pixels: rows from the top, pixels from the left, red, green, blue."""
    @property
    def png(self) -> bytes:
        """The PNG file that `respodiff sample` writes of it, byte for byte."""
    @property
    def image(self) -> Any:
        """The picture as a `PIL.Image.Image`, which needs the package pillow."""
    @property
    def __array_interface__(self) -> Dict[str, Any]: ...
    def to_pil(self) -> Any:
        """`image`, as a method."""
    def save(self, path: Union[str, os.PathLike[str]]) -> None:
        """Writes `png` to a file, whole or not at all."""
    def __reduce__(self) -> Tuple[Any, ...]: ...
