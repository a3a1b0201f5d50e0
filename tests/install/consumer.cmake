# cmake -DKIND=build_tree|prefix ... -P consumer.cmake: configures, builds and runs a stand-alone
# project that uses find_package(lshmoe): examples/minimal from a fresh install prefix, the README's
# program from the build tree.

function(run)
  execute_process(COMMAND ${ARGV} RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE out)
  if(NOT code EQUAL 0)
    string(JOIN " " command ${ARGV})
    message(FATAL_ERROR "exit ${code}: ${command}\n${out}")
  endif()
  set(out "${out}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
if(KIND STREQUAL "prefix")
  run(${CMAKE_COMMAND} --install "${BUILD_DIR}" --prefix "${WORK_DIR}/prefix")
  set(prefix "${WORK_DIR}/prefix")
  run("${prefix}/bin/lshmoe-train" --help)
  run("${prefix}/bin/lshmoe-bench" --help)
  set(project "${SOURCE_DIR}/examples/minimal")
  set(program minimal)
else()
  set(prefix "${BUILD_DIR}")
  file(READ "${SOURCE_DIR}/README.md" readme)
  if(NOT "${readme}" MATCHES "```cpp\n([^`]*int main[^`]*)```")
    message(FATAL_ERROR "README.md has no program")
  endif()
  set(project "${WORK_DIR}/source")
  file(COPY "${SOURCE_DIR}/tests/install/build_tree/" DESTINATION "${project}")
  file(WRITE "${project}/main.cpp" "${CMAKE_MATCH_1}")
  set(program readme)
endif()

# Not LSHMOE_VENV: the package must know by itself where its torch is.
run(${CMAKE_COMMAND} -E env --unset=LSHMOE_VENV
    ${CMAKE_COMMAND} -S "${project}" -B "${WORK_DIR}/build" -G "${GENERATOR}"
    "-DCMAKE_PREFIX_PATH=${prefix}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}")
run(${CMAKE_COMMAND} --build "${WORK_DIR}/build")
run("${WORK_DIR}/build/${program}")
message("${out}")
run("${MPIEXEC}" -n 2 "${WORK_DIR}/build/${program}")
message("${out}")

# The example must have learned, and have sent less than the raw rows.
if(KIND STREQUAL "prefix")
  string(REGEX MATCH "step   0  loss ([0-9.]+)" match "${out}")
  set(first "${CMAKE_MATCH_1}")
  string(REGEX MATCH "step 100  loss ([0-9.]+)  bytes sent ([0-9]+) of ([0-9]+)" match "${out}")
  set(last "${CMAKE_MATCH_1}")
  set(sent "${CMAKE_MATCH_2}")
  set(raw "${CMAKE_MATCH_3}")
  if(NOT first OR NOT last OR NOT last LESS first)
    message(FATAL_ERROR "the example's loss did not fall: '${first}' -> '${last}'")
  endif()
  if(NOT sent GREATER 0 OR NOT sent LESS raw)
    message(FATAL_ERROR "the example sent '${sent}' of '${raw}' raw bytes")
  endif()
endif()
