"""``bench --report``: a benchmark that resumes, its data, and one page that shows them.

``runner`` measures, ``document`` writes HTML of what was measured, ``charts`` draws, ``comparison``
tells two reports apart.
"""

from fused_resnet.report.comparison import compare
from fused_resnet.report.document import page
from fused_resnet.report.runner import run

__all__ = ["compare", "page", "run"]
