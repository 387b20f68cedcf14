"""Weight matrices: what a linear-time attention projects queries and keys on. Table :data:`WEIGHTS`."""

from .base import Draw, Projection, SampledWeight, WeightMatrix
from .gaussian import Gaussian, MomentMatched, Orthogonal, Simplex
from .generative import DeepGenerative, InvertibleFlow
from .learned import BlackBoxQuantile, GaussianMixture, LearnedFastfood
from .quadrature import GaussQuadrature, SparseGrid, SphericalRadial
from .quasi import QuasiMonteCarlo, SphericalStructured
from .structured import (
    Fastfood,
    PModel,
    RandomOrthogonalProducts,
    SignedCirculant,
    StructuredOrthogonal,
)

WEIGHTS: dict[str, type[WeightMatrix]] = {
    "mc": Gaussian,
    "orf": Orthogonal,
    "sorf": StructuredOrthogonal,
    "rom": RandomOrthogonalProducts,
    "simrf": Simplex,
    "scrf": SignedCirculant,
    "pmodel": PModel,
    "fastfood": Fastfood,
    "qmc": QuasiMonteCarlo,
    "mm": MomentMatched,
    "ssf": SphericalStructured,
    "gq": GaussQuadrature,
    "sgq": SparseGrid,
    "ssr": SphericalRadial,
    "fastfoodl": LearnedFastfood,
    "gmm": GaussianMixture,
    "dgm": DeepGenerative,
    "bbq": BlackBoxQuantile,
    "inn": InvertibleFlow,
}
"""Name of a weight matrix, as in the papers but lower case, to its class."""

__all__ = [
    "WEIGHTS",
    "BlackBoxQuantile",
    "DeepGenerative",
    "Draw",
    "Fastfood",
    "GaussQuadrature",
    "Gaussian",
    "GaussianMixture",
    "InvertibleFlow",
    "LearnedFastfood",
    "MomentMatched",
    "Orthogonal",
    "PModel",
    "Projection",
    "QuasiMonteCarlo",
    "RandomOrthogonalProducts",
    "SampledWeight",
    "SignedCirculant",
    "Simplex",
    "SparseGrid",
    "SphericalRadial",
    "SphericalStructured",
    "StructuredOrthogonal",
    "WeightMatrix",
]
