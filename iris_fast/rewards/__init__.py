"""Rewards: `table` names them, `intrinsic` and `external` compute them, `score` adds them up."""
