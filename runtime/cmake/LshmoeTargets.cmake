# lshmoe_add_folder(): one folder's sources as an object library; the shared precompiled header.

# Compiled once and used by every target that includes torch (REUSE_FROM): torch/torch.h costs 23 s
# a file without it.
add_library(lshmoe_pch OBJECT "${PROJECT_SOURCE_DIR}/runtime/cmake/pch.cpp")
target_link_libraries(lshmoe_pch PRIVATE lshmoe_flags LibTorch::cpu)
target_precompile_headers(lshmoe_pch PRIVATE <torch/torch.h> <torch/library.h>)

# lshmoe_add_folder(NAME [TORCH] SOURCES ... [LINK ...] [CUDA ...] [CUDA_DISABLED ...])
# CUDA: .cu and .cpp files of a build with CUDA; CUDA_DISABLED: their twins of one without.
# An object library lshmoe_NAME; its objects become part of liblshmoe. TORCH: may include torch, and
# uses the precompiled header; folders without it cannot (style: no torch below compress).
function(lshmoe_add_folder name)
  cmake_parse_arguments(arg "TORCH" "" "SOURCES;LINK;CUDA;CUDA_DISABLED" ${ARGN})
  if(NOT LSHMOE_WITH_CUDA)
    set(arg_CUDA ${arg_CUDA_DISABLED})
  endif()
  set(_kernels ${arg_CUDA})
  list(FILTER _kernels INCLUDE REGEX "\\.cu$")
  list(FILTER arg_CUDA EXCLUDE REGEX "\\.cu$")
  add_library(lshmoe_${name} OBJECT ${arg_SOURCES} ${arg_CUDA})
  target_include_directories(lshmoe_${name} PRIVATE "${PROJECT_BINARY_DIR}/include")
  target_link_libraries(lshmoe_${name} PRIVATE lshmoe_flags ${arg_LINK})
  if(arg_TORCH)
    target_link_libraries(lshmoe_${name} PRIVATE LibTorch::cpu)
    target_precompile_headers(lshmoe_${name} REUSE_FROM lshmoe_pch)
  endif()
  if(LSHMOE_WITH_CUDA)
    target_include_directories(lshmoe_${name} PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  endif()
  set_property(GLOBAL APPEND PROPERTY LSHMOE_OBJECT_LIBRARIES lshmoe_${name})
  if(_kernels)
    # A library of its own: the flags of host code are not for nvcc.
    add_library(lshmoe_${name}_cuda OBJECT ${_kernels})
    target_include_directories(lshmoe_${name}_cuda PRIVATE "${PROJECT_BINARY_DIR}/include")
    target_compile_options(lshmoe_${name}_cuda PRIVATE
      # Bits equal to the CPU's: nothing fused, divisions and roots as IEEE 754 says (the default).
      -fmad=false --Werror=all-warnings -Xcompiler=-fPIC,-Wall,-Wextra,-ffp-contract=off$<$<BOOL:${LSHMOE_WERROR}>:,-Werror>
      --expt-relaxed-constexpr)
    set_target_properties(lshmoe_${name}_cuda PROPERTIES
      CUDA_ARCHITECTURES "80-real;90-real;90-virtual" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON)
    set_property(GLOBAL APPEND PROPERTY LSHMOE_OBJECT_LIBRARIES lshmoe_${name}_cuda)
  endif()
endfunction()
