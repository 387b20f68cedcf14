"""The contract of a weight matrix and of a component function, as checks that anybody can run on their own.

::

    from spectraformer.testing import check_component, check_weight

    check_weight(MyWeight)         # raises ContractError, which says in words what is broken
    print(check_component(MyFunction))

Every check runs, so that one call shows everything there is to mend.
"""

from spectraformer.testing.component import check_component
from spectraformer.testing.report import ContractError, Report, z_score
from spectraformer.testing.weight import check_weight

__all__ = ["ContractError", "Report", "check_component", "check_weight", "z_score"]
