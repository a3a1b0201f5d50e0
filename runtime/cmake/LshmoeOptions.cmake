# Options of the build, compiler flags, ccache.

option(LSHMOE_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(LSHMOE_BUILD_PROGRAMS "Build lshmoe-train and lshmoe-bench" ${PROJECT_IS_TOP_LEVEL})
option(LSHMOE_WERROR "Treat warnings as errors" OFF)
set(LSHMOE_CUDA AUTO CACHE STRING "Build the CUDA path: AUTO (if a toolkit is found), ON, OFF")
set_property(CACHE LSHMOE_CUDA PROPERTY STRINGS AUTO ON OFF)
set(LSHMOE_VENV "$ENV{LSHMOE_VENV}" CACHE PATH "Python environment that holds torch (default: .venv)")
if(NOT LSHMOE_VENV)
  set(LSHMOE_VENV "${PROJECT_SOURCE_DIR}/.venv" CACHE PATH "" FORCE)
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(_lshmoe_default_march x86-64-v3)
endif()
set(LSHMOE_MARCH "${_lshmoe_default_march}" CACHE STRING
    "-march of the whole build; x86-64-v3 (AVX2, FMA) runs on every node of a usual cluster, native only on CPUs like this one")
set(LSHMOE_SANITIZE "" CACHE STRING "Sanitizers to build with, e.g. address,undefined")
option(LSHMOE_FUZZ "Build the fuzz targets of libFuzzer, too (Clang)" OFF)
if(LSHMOE_FUZZ AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  message(FATAL_ERROR "lshmoe: LSHMOE_FUZZ needs Clang, the compiler is ${CMAKE_CXX_COMPILER_ID}. "
                      "Install it (Debian: apt-get install clang libclang-rt-dev) and use the preset fuzz.")
endif()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)

find_program(LSHMOE_CCACHE ccache)
if(LSHMOE_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # The sloppiness is what lets ccache work with CMake's precompiled headers at all.
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
      CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      ${LSHMOE_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${LSHMOE_CCACHE})
endif()

# One set of flags for every target, or the shared precompiled header would not fit them. -fPIC is
# given here and not by POSITION_INDEPENDENT_CODE, which makes it -fPIE in programs.
add_library(lshmoe_flags INTERFACE)
target_compile_options(lshmoe_flags INTERFACE
  -fPIC -Wall -Wextra $<$<BOOL:${LSHMOE_WERROR}>:-Werror>
  $<$<BOOL:${LSHMOE_MARCH}>:-march=${LSHMOE_MARCH}>
  # Sender and receiver must compute the same bits, whatever the compiler fuses elsewhere.
  -ffp-contract=off)
if(LSHMOE_SANITIZE)
  target_compile_options(lshmoe_flags INTERFACE -fsanitize=${LSHMOE_SANITIZE}
    -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(lshmoe_flags INTERFACE -fsanitize=${LSHMOE_SANITIZE})
endif()
