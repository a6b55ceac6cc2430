# A library shows the symbols of its map and no other. Hidden visibility is not enough: the type information of
# std classes stays visible, and two libraries in a process would share it by accident.
function(lowbit_exports target map)
  set(map ${PROJECT_SOURCE_DIR}/${map})
  target_link_options(${target} PRIVATE -Wl,--version-script=${map})
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${map})
endfunction()
