"""The command line: ``cosmic``, and what the other modules add to it.

Whatever is heavy is imported inside the commands, so that ``cosmic --help`` answers at once.
"""

from __future__ import annotations

from workflow.cli_base import Grouped, group
from workflow.cli_check import EXAMPLES as CHECK_EXAMPLES
from workflow.cli_check import check
from workflow.cli_cost import EXAMPLES as COST_EXAMPLES
from workflow.cli_cost import cost
from workflow.cli_data import commands as data_commands
from workflow.cli_infer import EXAMPLES as INFER_EXAMPLES
from workflow.cli_infer import infer
from workflow.cli_model import commands as model_commands
from workflow.cli_report import EXAMPLES as REPORT_EXAMPLES
from workflow.cli_report import report
from workflow.cli_run import EXAMPLES as RUN_EXAMPLES
from workflow.cli_run import run
from workflow.cli_sweep import EXAMPLES as SWEEP_EXAMPLES
from workflow.cli_sweep import sweep

__all__ = ["app"]

app = group("Redshift inference by ranks that meet at a rendezvous and then talk directly.")
app.add_typer(data_commands, name="data")
app.add_typer(model_commands, name="model")
app.command(cls=Grouped, epilog=RUN_EXAMPLES)(run)
app.command(cls=Grouped, epilog=INFER_EXAMPLES)(infer)
app.command(cls=Grouped, epilog=SWEEP_EXAMPLES)(sweep)
app.command(cls=Grouped, epilog=CHECK_EXAMPLES)(check)
app.command(epilog=COST_EXAMPLES)(cost)
app.command(cls=Grouped, epilog=REPORT_EXAMPLES)(report)
