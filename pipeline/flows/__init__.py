"""Two flows that stand for gradient descent, one step of which is their unit of time.

`gradient_flow` is its limit for small steps; `CentralFlow` is where its iterates go on average when they are not small.
"""

from pipeline.flows.central import CentralFlow, Rate
from pipeline.flows.gradient import gradient_flow

__all__ = ["CentralFlow", "Rate", "gradient_flow"]
