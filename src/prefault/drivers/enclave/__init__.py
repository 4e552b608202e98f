"""An enclave page cache as device memory: a model of SGX's, and encrypted memory beyond a small pool of frames."""

from prefault.drivers.enclave.enclave import Enclave, EnclavePages, statistics
from prefault.drivers.enclave.enclave_page_cache import EnclavePageCache
from prefault.drivers.enclave.enclave_requests import EnclaveStatistics
from prefault.drivers.enclave.epcm import Code, EnclaveError, PageInfo, PageType

__all__ = [
    "Code",
    "Enclave",
    "EnclaveError",
    "EnclavePageCache",
    "EnclavePages",
    "EnclaveStatistics",
    "PageInfo",
    "PageType",
    "statistics",
]
