# Everything goes under lowbit/, which is the Python package's folder in a wheel and a plain prefix otherwise:
#   lowbit/lib/liblowbit.so  lowbit/include/lowbit/*.h  lowbit/lib/cmake/lowbit  lowbit/lib/pkgconfig/lowbit.pc
include(CMakePackageConfigHelpers)

# One file, named by its soname: wheels cannot hold the usual chain of symbolic links.
set_target_properties(lowbit PROPERTIES VERSION 0 SOVERSION 0)
install(TARGETS lowbit EXPORT lowbitTargets LIBRARY DESTINATION lowbit/lib NAMELINK_SKIP)
install(DIRECTORY csrc/include/lowbit DESTINATION lowbit/include)
install(EXPORT lowbitTargets NAMESPACE lowbit:: DESTINATION lowbit/lib/cmake/lowbit)

configure_package_config_file(csrc/cmake/lowbitConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/lowbitConfig.cmake
                              INSTALL_DESTINATION lowbit/lib/cmake/lowbit)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/lowbitConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(csrc/cmake/lowbit.pc.in ${CMAKE_CURRENT_BINARY_DIR}/lowbit.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/lowbitConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/lowbitConfigVersion.cmake
        DESTINATION lowbit/lib/cmake/lowbit)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/lowbit.pc DESTINATION lowbit/lib/pkgconfig)
