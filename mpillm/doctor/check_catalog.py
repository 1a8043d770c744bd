"""The checks of the doctor: name → class, in the order in which they run."""

from collections.abc import Mapping
from types import MappingProxyType

CHECKS: Mapping[str, str] = MappingProxyType(
    {
        # Software goes first: the checks of GPUs use what torch's import found.
        "software": "mpillm.doctor.checks.software:SoftwareCheck",
        "mpi-library": "mpillm.doctor.checks.loaded_mpi:MpiLibraryCheck",
        "mpirun": "mpillm.doctor.checks.mpirun:MpirunCheck",
        "processor": "mpillm.doctor.checks.processor_kind:ProcessorCheck",
        "cores": "mpillm.doctor.checks.host_cores:CoresCheck",
        "memory": "mpillm.doctor.checks.host_memory:MemoryCheck",
        "shared-memory": "mpillm.doctor.checks.dev_shm:SharedMemoryCheck",
        "limits": "mpillm.doctor.checks.process_limits:LimitsCheck",
        "interfaces": "mpillm.doctor.checks.interfaces:InterfacesCheck",
        "infiniband": "mpillm.doctor.checks.infiniband:InfiniBandCheck",
        "gpu-count": "mpillm.doctor.checks.gpu_count:GpuCountCheck",
        "gpu-aware": "mpillm.doctor.checks.cuda_aware:CudaAwareCheck",
        "folders": "mpillm.doctor.checks.folders:FoldersCheck",
        "reach": "mpillm.doctor.checks.reach:ReachCheck",
        "batch-system": "mpillm.doctor.checks.found_schedulers:BatchSystemCheck",
        "site-file": "mpillm.doctor.checks.site_file:SiteFileCheck",
        "alike": "mpillm.doctor.checks.homogeneous:AlikeCheck",
        "shared-folder": "mpillm.doctor.checks.shared_folder:SharedFolderCheck",
        "binding": "mpillm.doctor.checks.binding:BindingCheck",
        "neighbours": "mpillm.doctor.checks.ring_links:NeighboursCheck",
        "profile": "mpillm.doctor.checks.profile_match:ProfileCheck",
    }
)
