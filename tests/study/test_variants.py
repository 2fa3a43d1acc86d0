"""The parts that the ablations exchange, and the candidates' formulas."""
import torch

from extras import baselines
from folora import SAdam
from matrices import normal
from study import variants
from study.variants import METHODS


def test_variants_extend_the_methods_without_changing_them():
    assert {**METHODS, **baselines.METHODS} == METHODS
    assert not variants.SHARES.keys() & baselines.METHODS.keys()


def test_pulling_back_one_factor_leaves_the_other_to_sadam():
    """With a basis (A) or without (B): its parameter moves as PullBack's or as SAdam's."""
    def trained(kind, spectral):
        p = torch.nn.Parameter(normal(0)(3, 4))
        optimizer = kind([p], {p: spectral} if spectral else None, lr=0.1)
        optimizer.strength = 2
        for seed in range(3):
            p.grad = normal(seed)(3, 4)
            optimizer.step()
        return p.detach()

    for spectral in (torch.eye(4).double(), torch.full((4,), 0.4)), None:
        both, neither = trained(baselines.PullBack, spectral), trained(SAdam, spectral)
        A, B = trained(variants.PullBackA, spectral), trained(variants.PullBackB, spectral)
        assert not torch.allclose(both, neither)
        assert torch.equal(A, both if spectral else neither)
        assert torch.equal(B, neither if spectral else both)
