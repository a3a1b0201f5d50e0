# liblshmoe from the folders' objects; install and export.

get_property(_lshmoe_objects GLOBAL PROPERTY LSHMOE_OBJECT_LIBRARIES)
# SHARED: a static library would silently lose the registration of the torch ops.
add_library(lshmoe SHARED)
add_library(lshmoe::lshmoe ALIAS lshmoe)
foreach(_object IN LISTS _lshmoe_objects)
  target_sources(lshmoe PRIVATE $<TARGET_OBJECTS:${_object}>)
endforeach()
if(LSHMOE_WITH_CUDA)
  set(_lshmoe_torch LibTorch::cuda)
  set(_lshmoe_cuda CUDA::cudart CUDA::cublas)
else()
  set(_lshmoe_torch LibTorch::cpu)
endif()
if(LSHMOE_WITH_NCCL)
  list(APPEND _lshmoe_cuda "${LSHMOE_NCCL_LIBRARY_DIR}/libnccl.so.2")
endif()
target_link_libraries(lshmoe
  PUBLIC ${_lshmoe_torch}
  PRIVATE $<BUILD_INTERFACE:lshmoe_flags> ${_lshmoe_cuda} MPI::MPI_CXX Boost::program_options spdlog::spdlog Threads::Threads)
target_include_directories(lshmoe PUBLIC
  $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(lshmoe PUBLIC cxx_std_20)
set_target_properties(lshmoe PROPERTIES
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR} LINKER_LANGUAGE CXX
  INSTALL_RPATH "$ORIGIN;${LibTorch_LIBRARY_DIR};${LSHMOE_NCCL_LIBRARY_DIR}")
if(NOT LSHMOE_SANITIZE)  # Clang has the sanitizers' symbols in programs only
  # Symbols missing at link time are found here and not by the first user.
  target_link_options(lshmoe PRIVATE LINKER:--no-undefined)
endif()

include(CMakePackageConfigHelpers)
install(TARGETS lshmoe EXPORT lshmoeTargets)
foreach(_folder IN LISTS LSHMOE_FOLDERS)
  install(DIRECTORY "${PROJECT_SOURCE_DIR}/${_folder}/"
          DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/lshmoe/${_folder}"
          FILES_MATCHING PATTERN "*.hpp")
endforeach()
install(EXPORT lshmoeTargets NAMESPACE lshmoe::
        DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/lshmoe")
export(EXPORT lshmoeTargets NAMESPACE lshmoe:: FILE "${PROJECT_BINARY_DIR}/lshmoeTargets.cmake")
configure_package_config_file("${PROJECT_SOURCE_DIR}/runtime/cmake/lshmoeConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/lshmoeConfig.cmake"
  INSTALL_DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/lshmoe")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/lshmoeConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
file(COPY "${PROJECT_SOURCE_DIR}/runtime/cmake/FindLibTorch.cmake" DESTINATION "${PROJECT_BINARY_DIR}")
install(FILES
  "${PROJECT_BINARY_DIR}/lshmoeConfig.cmake" "${PROJECT_BINARY_DIR}/lshmoeConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/runtime/cmake/FindLibTorch.cmake"
  DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/lshmoe")
