# Finds the LibTorch of a Python torch wheel, with or without a CUDA toolkit on this machine.
#
# torch's own TorchConfig.cmake stops when the wheel is a CUDA one and no toolkit is installed, and
# rewrites CMAKE_CUDA_FLAGS when one is; this module only imports the libraries.
#
# Input:  LSHMOE_VENV        the Python environment that holds torch (default: <source>/.venv)
#         LibTorch_ROOT      the folder of torch itself, when it is not in a venv
# Result: LibTorch::cpu      libtorch_cpu + libc10
#         LibTorch::cuda     the above + libtorch_cuda + libc10_cuda (only when the wheel has them)
#         LibTorch_VERSION, LibTorch_INCLUDE_DIR, LibTorch_LIBRARY_DIR, LibTorch_HAS_CUDA

if(NOT LibTorch_ROOT)
  file(GLOB _lshmoe_torch_candidates "${LSHMOE_VENV}/lib/python3*/site-packages/torch")
  if(_lshmoe_torch_candidates)
    list(GET _lshmoe_torch_candidates 0 LibTorch_ROOT)
  endif()
endif()

find_path(LibTorch_INCLUDE_DIR torch/headeronly/version.h
  PATHS "${LibTorch_ROOT}/include" NO_DEFAULT_PATH)
find_library(LibTorch_cpu_LIBRARY torch_cpu PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_c10_LIBRARY c10 PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_cuda_LIBRARY torch_cuda PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_c10_cuda_LIBRARY c10_cuda PATHS "${LibTorch_ROOT}/lib" NO_DEFAULT_PATH)
mark_as_advanced(LibTorch_INCLUDE_DIR LibTorch_cpu_LIBRARY LibTorch_c10_LIBRARY
                 LibTorch_cuda_LIBRARY LibTorch_c10_cuda_LIBRARY)

if(LibTorch_INCLUDE_DIR)
  file(STRINGS "${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h" _lshmoe_torch_version
       REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX MATCHALL "[0-9]+" _lshmoe_torch_version "${_lshmoe_torch_version}")
  list(JOIN _lshmoe_torch_version "." LibTorch_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_cpu_LIBRARY LibTorch_c10_LIBRARY LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE
    "no torch in '${LSHMOE_VENV}': run launch/setup.sh, or set LSHMOE_VENV to a Python environment with torch (pip install torch==2.11.0)")

if(LibTorch_FOUND)
  get_filename_component(LibTorch_LIBRARY_DIR "${LibTorch_cpu_LIBRARY}" DIRECTORY)
  if(LibTorch_cuda_LIBRARY AND LibTorch_c10_cuda_LIBRARY)
    set(LibTorch_HAS_CUDA TRUE)
  else()
    set(LibTorch_HAS_CUDA FALSE)
  endif()
  if(NOT TARGET LibTorch::cpu)
    add_library(LibTorch::c10 SHARED IMPORTED)
    set_target_properties(LibTorch::c10 PROPERTIES IMPORTED_LOCATION "${LibTorch_c10_LIBRARY}")
    add_library(LibTorch::cpu SHARED IMPORTED)
    set_target_properties(LibTorch::cpu PROPERTIES
      IMPORTED_LOCATION "${LibTorch_cpu_LIBRARY}"
      INTERFACE_INCLUDE_DIRECTORIES
        "${LibTorch_INCLUDE_DIR};${LibTorch_INCLUDE_DIR}/torch/csrc/api/include"
      INTERFACE_LINK_LIBRARIES LibTorch::c10)
  endif()
  if(LibTorch_HAS_CUDA AND NOT TARGET LibTorch::cuda)
    add_library(LibTorch::c10_cuda SHARED IMPORTED)
    set_target_properties(LibTorch::c10_cuda PROPERTIES
      IMPORTED_LOCATION "${LibTorch_c10_cuda_LIBRARY}")
    add_library(LibTorch::cuda SHARED IMPORTED)
    # torch_cuda registers its kernels when it is loaded, and nothing here references a symbol of
    # it: without --no-as-needed the linker would drop it.
    set_target_properties(LibTorch::cuda PROPERTIES
      IMPORTED_LOCATION "${LibTorch_cuda_LIBRARY}"
      INTERFACE_LINK_LIBRARIES "LibTorch::cpu;LibTorch::c10_cuda"
      INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
  endif()
endif()
