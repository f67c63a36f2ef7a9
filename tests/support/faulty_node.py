"""A node that computes wrong values, in the ranks of a command that imports this module before anything else.

Machines here compute what they should. So one bit of a gradient flips in one computation of the rank on that node; everything
after that, beginning with the cross-check that finds it, is the real code.
"""

import os

from jobs.scheduler.job_end import node_name
from tests.support.wrong_values import Fault, strike

NODE, COMPUTATION = "TEST_FAULTY_NODE", "TEST_FAULTY_COMPUTATION"
"""Variables with the name of the node, and which computation of a micro-batch there is wrong, from 0."""

if "RANK" in os.environ and node_name(os.environ) == os.environ[NODE]:
    number = int(os.environ[COMPUTATION])
    strike(Fault(int(os.environ["RANK"]), "head.classifier.weight", number, number))
