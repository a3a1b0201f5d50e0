# lshmoe_add_folder(): one folder's sources as an object library; the shared precompiled header.

# Compiled once and used by every target that includes torch (REUSE_FROM): torch/torch.h costs 23 s
# a file without it.
add_library(lshmoe_pch OBJECT "${PROJECT_SOURCE_DIR}/runtime/cmake/pch.cpp")
target_link_libraries(lshmoe_pch PRIVATE lshmoe_flags LibTorch::cpu)
target_precompile_headers(lshmoe_pch PRIVATE <torch/torch.h> <torch/library.h>)

# lshmoe_add_folder(NAME [TORCH] SOURCES ... [LINK ...])
# An object library lshmoe_NAME; its objects become part of liblshmoe. TORCH: may include torch, and
# uses the precompiled header; folders without it cannot (style: no torch below compress).
function(lshmoe_add_folder name)
  cmake_parse_arguments(arg "TORCH" "" "SOURCES;LINK" ${ARGN})
  add_library(lshmoe_${name} OBJECT ${arg_SOURCES})
  target_include_directories(lshmoe_${name} PRIVATE "${PROJECT_BINARY_DIR}/include")
  target_link_libraries(lshmoe_${name} PRIVATE lshmoe_flags ${arg_LINK})
  if(arg_TORCH)
    target_link_libraries(lshmoe_${name} PRIVATE LibTorch::cpu)
    target_precompile_headers(lshmoe_${name} REUSE_FROM lshmoe_pch)
  endif()
  set_property(GLOBAL APPEND PROPERTY LSHMOE_OBJECT_LIBRARIES lshmoe_${name})
endfunction()
