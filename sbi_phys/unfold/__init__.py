"""Unfolding: from what was measured back to what was true, with full covariance and the prior's share of it.

response        Response: matrix with efficiency, fakes, background and its own noise, from pairs or from a resolution
binned          ibu (iterative Bayes) · tikhonov (regularised least squares) · forward_fold (parametric flux)
                bayesian_unfold (posterior over spectra); all four take and give histograms of hist and boost-histogram
unbinned        omnifold (weights for all truth events) · FlowUnfolder (event by event) · bootstrap_omnifold, bootstrap_flow
                ForwardUnfolder (p(reco | truth) learned, then the truth fitted: no simulated spectrum is remembered)
proof           validate (closure, stress, toys, bottom line, prior) · event_pit
data            read_pairs, response_from_store (simulation stores)
"""

from sbi_phys.core.lazy import public_names
from sbi_phys.unfold.ibu import ibu as ibu  # bound here: Python would bind the module of that name otherwise
from sbi_phys.unfold.tikhonov import tikhonov as tikhonov

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
