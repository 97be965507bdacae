"""Every setting of the package: frozen dataclasses, one docstring a field, checked when they are made.

Each room's config.py has its own, and names in `__all__` what is handed on here.
"""

from avppc.data.config import *
from avppc.doctor import DoctorConfig as DoctorConfig
from avppc.evaluate.config import *
from avppc.export.config import *
from avppc.losses.config import *
from avppc.models.config import *
from avppc.ops.log_mel.config import *
from avppc.synth.config import *
from avppc.tasks.config import *
from avppc.train.config import *
