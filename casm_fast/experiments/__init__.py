"""Every table and figure of the CASM paper, one recipe each."""

from casm_fast.experiments.reproduction import EXPERIMENTS, Reproduction, reproduce
from casm_fast.experiments.study import FULL, QUICK, SMOKE, Scale

__all__ = ["EXPERIMENTS", "FULL", "QUICK", "SMOKE", "Reproduction", "Scale", "reproduce"]
