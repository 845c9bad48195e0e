from collections.abc import Iterable
from contextlib import AbstractContextManager

from bla.comparison.side_by_side import compare as compare
from bla.data import photo as photo
from bla.data.photo import Transform as Transform
from bla.explanations.explanation import Explanation as Explanation
from bla.explanations.explanation import gallery as gallery
from bla.model.attention import BoundedLogitAttention as BoundedLogitAttention
from bla.model.classifier import explainable as explainable
from bla.runs.hub import from_pretrained as from_pretrained
from bla.runs.hub import push_to_hub as push_to_hub
from bla.runs.hub import save_pretrained as save_pretrained
from bla.runs.run import fit as fit
from bla.runs.run import load as load
from bla.runs.run import train as train

__all__: list[str]
__version__: str

class BlaError(ValueError): ...

def meant(name: str, names: Iterable[str]) -> str: ...
def needs_extra(extra: str, error: type[BlaError] = ...) -> AbstractContextManager[None]: ...
