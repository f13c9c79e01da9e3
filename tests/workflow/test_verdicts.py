"""What to do next follows from the numbers. The levels of the verdicts are in test_stages."""

import pytest

from sbi_phys.workflow.verdicts import next_steps, training_state, verdicts

CALIBRATED = {"adjusted": {"sbc": 0.5}, "failed": [], "passed": True, "verdict": "fine"}
UNCALIBRATED = {"adjusted": {"sbc": 1e-5}, "failed": ["sbc"], "passed": False, "verdict": "no"}
WRONG_HERE = {"adjusted": {"sbc": 0.5, "lc2st": 1e-9}, "failed": ["lc2st"], "passed": False, "verdict": "no"}
NOTHING = {
    "likelihood": False,
    "c2st_final": None,
    "c2st_amortised": None,
    "max_median_shift_sd": None,
    "mcmc": {"converged": None},
    "refined": False,
    "importance_ess_fraction": None,
    "importance_ess": None,
    "importance_pareto_k": None,
    "calibration": CALIBRATED,
    "predictive_pvalue": 0.4,
    "predictive_statistic": "chi-square",
    "misspecification": {"quantile": 0.5, "pvalue": 0.4},
    "prior_predictive": {"n": 2000, "n_columns": 100, "n_outside": 0, "n_expected": 0.1, "outside": []},
    "training": {"n_epochs": 20, "falling": 0.0, "gap": 0.05},
    "rounds": {"skipped": "rounds.n_rounds = 0"},
    "n_simulations": 2000,
    "n_failed": 0,
    "pulls": {"n": [0.5, -4.0]},
}
FALLING = {"n_epochs": 20, "falling": 0.3, "gap": 0.05}
OUTSIDE = {"n": 2000, "n_columns": 100, "n_outside": 40, "n_expected": 0.1, "outside": ["camera[3]"]}


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        ({}, []),
        ({"training": FALLING}, ["Train longer"]),
        ({"training": FALLING, "refined": True, "importance_ess_fraction": 0.3, "importance_ess": 3000.0}, []),
        ({"training": {"n_epochs": 20, "falling": 0.0, "gap": 0.9}}, ["Simulate more"]),
        ({"calibration": UNCALIBRATED}, ["Take a larger network"]),
        ({"calibration": UNCALIBRATED, "training": FALLING}, ["Train longer"]),
        ({"calibration": WRONG_HERE}, ["Add simulations near the observation"]),
        ({"calibration": WRONG_HERE, "rounds": {"n_rounds": 1}}, ["Take a larger network"]),
        ({"calibration": {"adjusted": None}}, ["Test the calibration"]),
        ({"importance_ess_fraction": 0.001, "importance_ess": 200.0, "refined": True}, ["Add simulations near the observation"]),
        ({"prior_predictive": OUTSIDE}, ["Check the observation"]),
        ({"misspecification": {"quantile": 0.999, "pvalue": None}, "calibration": WRONG_HERE}, ["Check the observation"]),
        ({"predictive_pvalue": 1e-4}, ["Check the model"]),
        ({"predictive_pvalue": 1e-4, "calibration": UNCALIBRATED}, ["Take a larger network", "Repeat the predictive check"]),
        ({"predictive_pvalue": 1e-4, "prior_predictive": OUTSIDE}, ["Check the observation"]),
        ({"n_failed": 200}, ["Find out why simulations fail"]),
        ({"max_median_shift_sd": 0.0, "c2st_final": 0.5, "mcmc": {"converged": False}}, ["Run the exact MCMC longer"]),
    ],
)
def test_the_next_steps_follow_from_the_numbers(changes, begins):
    steps = next_steps(NOTHING | changes)
    assert [step.level for step in steps] == ["next"] * len(begins)
    assert all(step.words.startswith(begin) for step, begin in zip(steps, begins, strict=True)), steps


def test_steps_give_the_numbers_that_they_follow_from():
    (step,) = next_steps(NOTHING | {"training": FALLING})
    assert "fell by 0.3 nats per epoch at the end of 20 epochs" in step.detail
    (step,) = next_steps(NOTHING | {"predictive_pvalue": 1e-4})
    assert step.detail == "Largest pulls: n, column 1 (4.0 sd); n, column 0 (0.5 sd)."
    (step,) = next_steps(NOTHING | {"prior_predictive": OUTSIDE})
    assert "camera[3]" in step.detail


def test_without_a_likelihood_the_verdicts_are_on_network_model_and_observation():
    assert [v.level for v in verdicts(NOTHING)] == ["good"] * 3
    words = " ".join(v.words + v.detail for v in verdicts(NOTHING | {"calibration": WRONG_HERE, "training": FALLING})).lower()
    assert "refine" not in words and "mcmc" not in words
    with_likelihood = verdicts(NOTHING | {"likelihood": True})
    assert [v.level for v in with_likelihood] == ["warn", "warn", "good", "good", "good"]


def test_columns_outside_all_simulations_are_a_problem():
    found = verdicts(NOTHING | {"prior_predictive": OUTSIDE})
    assert found[2].level == "bad" and "40 of 100 columns lie outside all 2000 simulations" in found[2].detail
    few = OUTSIDE | {"n_outside": 1}
    assert verdicts(NOTHING | {"prior_predictive": few})[2].level == "good"


def test_the_state_of_a_training():
    falling = [{"valid": 5.0 - k, "train": 4.5 - k} for k in range(4)]
    assert training_state([falling]) == {"n_epochs": 4, "falling": 1.0, "gap": 0.5}
    turned = [{"valid": v, "train": v - 1.5} for v in (3.0, 1.0, 2.0)]
    assert training_state([turned]) == {"n_epochs": 3, "falling": 0.0, "gap": 1.5}
    assert training_state([falling, turned]) == {"n_epochs": 4, "falling": 1.0, "gap": 1.5}
    assert training_state([[{"valid": 1.0, "train": 1.0}]]) == {"n_epochs": 1, "falling": 0.0, "gap": 0.0}
    assert training_state([]) == {}
