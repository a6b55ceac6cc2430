# Instruction sets by file name: <stem>_avx2.cpp, <stem>_avxvnni.cpp, <stem>_avx512vnni.cpp and <stem>_amx.cpp get the
# flags of their level, every other file the compiler's baseline, so that nothing but a selected kernel uses what the CPU
# may lack.
set(LOWBIT_AVX2_FLAGS -mavx2 -mfma -mf16c)
set(LOWBIT_AVXVNNI_FLAGS ${LOWBIT_AVX2_FLAGS} -mavxvnni)
# gcc 12's own AVX-512 headers trip its warnings about uninitialized variables (its bug 105593).
set(LOWBIT_AVX512VNNI_FLAGS -Wno-maybe-uninitialized -Wno-uninitialized -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni)

function(lowbit_kernel_flags)
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    message(FATAL_ERROR "lowbit's CPU kernels are written for x86-64, got ${CMAKE_SYSTEM_PROCESSOR}")
  endif()
  # Lane arithmetic cannot be undefined, and its checks double the compiler's time: the scalar code keeps them all.
  if(LOWBIT_SANITIZE MATCHES "undefined")
    set(unchecked -fno-sanitize=undefined)
  endif()
  foreach(source IN LISTS ARGN)
    if(source MATCHES "_(avx512vnni|amx)\\.cpp$")  # tiles are written in asm, which takes no flag
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${LOWBIT_AVX512VNNI_FLAGS};${unchecked}")
    elseif(source MATCHES "_avxvnni\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${LOWBIT_AVXVNNI_FLAGS};${unchecked}")
    elseif(source MATCHES "_avx2\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${LOWBIT_AVX2_FLAGS};${unchecked}")
    endif()
  endforeach()
endfunction()
