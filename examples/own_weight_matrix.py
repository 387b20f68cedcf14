"""A weight matrix of your own, checked and used: antithetic pairs of orthogonal rows.

A package offers it to everybody by an entry point, and it is then found by name:

    [project.entry-points."spectraformer.weights"]
    antithetic = "my_package:Antithetic"
"""

import torch

import spectraformer as sf
from spectraformer.testing import check_weight
from spectraformer.weights import Draw, SampledWeight
from spectraformer.weights.base import chi, haar


class Antithetic(SampledWeight):
    """Rows in pairs w, -w, with Haar directions and chi norms: each row is N(0, I), so it is unbiased."""

    def sample(self, generator):
        d, m = self.head_dim, self.num_features
        rows = torch.cat([haar(d, generator) for _ in range(m // (2 * d) + 1)])[: (m + 1) // 2]
        rows = rows * chi(d, len(rows), generator)[:, None]
        return Draw(torch.cat((rows, -rows))[:m])


if __name__ == "__main__":
    print(check_weight(Antithetic))
    weight = Antithetic(64, 256, generator=torch.Generator().manual_seed(0))
    feature_map = sf.FeatureMap(64, 256, "oprf", weight)
    q, k, v = torch.randn(3, 2, 4, 100, 64).unbind()
    print(sf.random_feature_attention(q, k, v, feature_map).shape)
