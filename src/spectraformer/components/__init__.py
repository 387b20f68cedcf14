"""Component functions f: what turns a projected token into a feature. A new one is one class and one line here."""

from __future__ import annotations

from spectraformer.components.base import KERNELS, ComponentFunction, Kernel, Parameters, Tokens
from spectraformer.components.dense import ADERF, CDERF, SDERF
from spectraformer.components.discrete import GeomRF, GeomRFPlus, PoisRF, PoisRFPlus
from spectraformer.components.exponential import GERF, OPRF, SADERF, HypRF, PosRF
from spectraformer.components.hybrid import HRF
from spectraformer.components.pairs import Exponential, Features, Signed
from spectraformer.components.trigonometric import TrigRF

COMPONENTS: dict[str, type[ComponentFunction]] = {
    "trigrf": TrigRF,
    "posrf": PosRF,
    "hyprf": HypRF,
    "gerf": GERF,
    "oprf": OPRF,
    "sderf": SDERF,
    "aderf": ADERF,
    "saderf": SADERF,
    "cderf": CDERF,
    "poisrf": PoisRF,
    "geomrf": GeomRF,
    "poisrf+": PoisRFPlus,
    "geomrf+": GeomRFPlus,
    "hrf": HRF,
}

__all__ = [
    "COMPONENTS",
    "KERNELS",
    "ComponentFunction",
    "Exponential",
    "Features",
    "Kernel",
    "Parameters",
    "Signed",
    "Tokens",
]
